"""What a served model needs beside the base's own products, by device; `contract` says what, and chooses."""
