"""Fine-tuning jobs: training processes beside the server, their files and their history. No HTTP in it."""
