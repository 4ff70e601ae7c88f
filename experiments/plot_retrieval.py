def table(rows): return f"{len(rows)} rows"
def draw(rows,out,name): return []
