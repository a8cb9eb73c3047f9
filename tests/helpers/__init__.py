"""What several tests need: pico models, tasks, zoos, generators and results made on the spot."""
