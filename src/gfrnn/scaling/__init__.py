"""How far training scales, and why: what an update sends, and what is measured of it."""
