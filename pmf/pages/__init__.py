"""Views of a run in a browser: an interactive sampling page (`demo`) and a report (`report`)."""
