"""Sets of pictures made smaller or better for learning from, a system per file."""
