"""Which web servers answer: the classic first job over a crawl.

`COUNT_BY` makes the job count its rows by these columns instead of writing them out.
"""

COUNT_BY = ["server"]


def record(r):
    if r.type == "response":
        return {"server": r.http.get("server") or "(none)"}
