"""`lrl ui`: a page on live and finished runs. `records` is what server and page say to each other; the page is made in `web/`."""
