"""From a directory to a release, stage by stage; read `deploy` first."""
