"""A page of tables and charts from results in JSON.

Others import page (load_result, write_report) and plots (write_plots).
"""
