"""A page of tables and charts from results in JSON.

Others import page (load_result, sections_of, write_report), plots (write_plots, save) and sections,
and for pages of their own templates, charts, curves, section (its Table) and colors.
"""
