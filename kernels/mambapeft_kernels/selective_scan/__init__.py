"""The selective scan (S6) recurrence."""
