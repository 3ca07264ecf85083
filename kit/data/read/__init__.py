"""Read archives and files of rows, near or far: records, pages, their charset."""
