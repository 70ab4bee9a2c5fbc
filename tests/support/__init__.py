"""What tests share: tolerances, problems, models, stand-ins for a GPU and for a clock."""
