"""How things are said: rows on a screen, and what a mistyped name probably meant."""
