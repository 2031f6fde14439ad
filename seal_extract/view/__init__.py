"""Pages and pictures: the viewer, reports of a slide and of a cohort, heat maps and contact sheets."""
