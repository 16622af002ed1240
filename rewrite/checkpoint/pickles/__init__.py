"""Safe unpickling: parse to inert data, judge its names, then build objects with own code."""
