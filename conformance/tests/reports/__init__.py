"""Tests of the reports: data, page, pictures, badge, and what is left when a run dies."""
