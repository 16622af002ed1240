"""How things are said: rows on a screen, the first of many names, what a mistyped one meant."""
