"""What others do: routers and orders of the field, written from their published formulas."""
