"""Where the tissue of a slide is, found in its overview or given as GeoJSON."""
