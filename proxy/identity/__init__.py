"""Who calls: users, their passwords, their API keys."""
