"""A report as one HTML file: self-contained, offline, to send to a colleague."""
