"""What a command needs as a process: requests to stop, exit codes, its record, its ranks."""
