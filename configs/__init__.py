"""Config programs: each returns a ConfigDict from `get_config(arg)`."""
