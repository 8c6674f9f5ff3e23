"""What the loop in the script needs: settings, optimiser, checkpoints, validation, processes, export."""
