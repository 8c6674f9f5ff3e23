"""What people see of a run: progress, trackers, report page, model card."""
