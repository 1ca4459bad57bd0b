def redraw(out, script):
    pass
