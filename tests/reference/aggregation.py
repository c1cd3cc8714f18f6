"""Sections 3.6 and 4.6 to the letter: block by block, number by number."""


def block(name):
    head, second = name.split(".")[:2]
    return {"encoder": f"encoder.{second}", "head": f"head.{second}", "fusion": "fusion"}.get(
        head, ".".join(name.split(".")[:3])
    )


def aggregate(w, clients):
    """w: {name: list of numbers}; clients: [(n_k, {name: list of numbers} of the blocks that k trained)]."""
    blocks = {block(name) for name in w}
    new = {}
    for b in blocks:
        owners = [(n, v) for n, v in clients if any(block(name) == b for name in v)]
        total = sum(n for n, _ in owners)
        for name in (name for name in w if block(name) == b):
            if not owners:
                new[name] = list(w[name])
                continue
            new[name] = [sum(n / total * v[name][i] for n, v in owners) for i in range(len(w[name]))]
    return new
