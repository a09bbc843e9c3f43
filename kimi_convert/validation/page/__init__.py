"""Reports that people can look at: data first, then one page and plots made of it."""
