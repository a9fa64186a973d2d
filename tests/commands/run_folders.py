"""Run folders with made-up scores."""

import json


def write_run(folder, values, group=None, data="d", **manifest):
    """A run folder with scores: `values[(explainer, metric)]` per sample."""
    test = folder / "test"
    (test / "maps").mkdir(parents=True)
    lines = ["split,index,name,label,target,explainer,metric,value"]
    for (explainer, metric), column in values.items():
        lines += [f"test,{i},s{i},1,1,{explainer},{metric},{value}" for i, value in enumerate(column)]
    (test / "scores.csv").write_text("\n".join(lines) + "\n")
    count = len(next(iter(values.values())))
    rows = [f"test,{i},s{i},1,1,0.5" + ("" if group is None else f",{group[i]}") for i in range(count)]
    header = "split,index,name,label,prediction,probability" + ("" if group is None else ",group")
    (test / "predictions.csv").write_text("\n".join([header, *rows]) + "\n")
    facts = {"data": data, "split": "test", "settings": {}, **manifest}
    (test / "maps" / "manifest.json").write_text(json.dumps(facts))
