"""Settings of the stages, one folder a preset and one YAML file a stage."""
