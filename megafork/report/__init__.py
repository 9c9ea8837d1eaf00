"""Inspecting runs: entropy statistics and the HTML report. Reads run folders, never a model."""
