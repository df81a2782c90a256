"""The books: reservations, charges and credits, decided in one place and written in batches."""
