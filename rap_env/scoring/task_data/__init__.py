"""Word lists and templates of the generated tasks."""
