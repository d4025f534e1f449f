"""The learn wing: training loops, losses and schedules."""
