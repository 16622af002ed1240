"""Operations that write in place, as functions: who reads what was written, and what to call."""
