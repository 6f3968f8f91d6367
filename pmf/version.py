"""The version of the distribution, readable without importing torch."""

VERSION = "0.1.0"
