"""What every reactor of this package shares: registrations, dispatch, clean-up."""
