"""What a browser shows of a run: a page that samples at once (`demo`) and a written report (`report`)."""
