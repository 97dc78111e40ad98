"""The text of report.md (Jinja2): a string, because Flower's app bundle carries modules, not templates."""

from __future__ import annotations

TEMPLATE = """\
# Run {{ config.name }}

{{ config.method }} on `{{ config.model }}`: {{ trained }}.
{{ clients }} clients, {{ summary.rounds }} rounds, {{ summary.steps }} local steps in all,
{{ "%.0f" | format(summary.seconds) }} s on engine `{{ record.engine }}`, seed {{ config.seed }},
{{ config.threads }} thread{{ "s" if config.threads > 1 }} per client.

## Quality

| task | metric | dev, before | dev, end | test, end | personalized, last round |
|---|---|---:|---:|---:|---:|
{% for row in quality -%}
| {{ row.task }} | {{ row.metric }} | {{ score(row.before) }} | {{ score(row.dev) }} | {{ score(row.test) }} | {{ score(row.personal) }} |
{% endfor %}
The test split is read once, after the last round; nothing was chosen by it.

![score on the dev split against payload bytes](figures/{{ figures.quality }})

![score by round](figures/{{ figures.rounds }})

## Bytes

Per client and round, mean over the training messages that were answered:

| direction | payload | whole message | bits of payload a backbone parameter |
|---|---:|---:|---:|
{% for row in traffic -%}
| {{ row.direction }} | {{ size(row.payload) }} | {{ size(row.message) }} | {{ "%.4g" | format(bits[row.direction]) }} |
{% endfor %}
Masks and training of all clients and rounds, as measured and by formula (values at the codecs' bytes a value, and what
brings a client its mask; a reply that never came is in the formula alone):

| direction | payload by formula | payload | whole messages |
|---|---:|---:|---:|
{% for row in formula -%}
| {{ row.direction }} | {{ "-" if row.formula is none else size(row.formula) }} | {{ size(row.payload) }} | {{ size(row.message) }} |
{% endfor %}
{% if wire -%}
SuperLink's own counters of this run: {{ size(wire.up) }} from the SuperNodes, {{ size(wire.down) }} to them.

{% endif -%}
Against other ways of fine-tuning with the same clients, rounds and heads (payload; means per client and
round, then the whole run with all clients and both directions):

| what is sent | up | down | whole run | times this run | indices | with two int32 | with COO int64 |
|---|---:|---:|---:|---:|---:|---:|---:|
{% for row in ways -%}
|{% for cell in way_cells(row) %} {{ cell }} |{% endfor %}
{% endfor %}
The first row is the sum of this run's ledger (masks and training); the others are computed from shapes and
this run's schedule: the same k and the same codecs of values, indices at the best code known and charged
whenever a mask is new to its reader. *Indices* is their share of the whole run, not of one round; the last two
columns have the whole run with indices in released formats: two int32 an entry (PEFT's SHiRA), and torch's sparse
COO format, two int64 (FL4Health). {% if overlap -%}
{% if overlap.batches -%}
A mask per client: its k entries of largest mean gradient over
{{ overlap.batches }} of its own batches. The masks{% else -%}
Each client had a mask of its own ({{ overlap.rule }}). The masks{% endif %} of the {{ overlap.clients }} clients hold
{{ "{:,}".format(overlap.union) }} different entries ({{ "%.2f" | format(overlap.union / overlap.k) }} x k;
mean Jaccard index {{ score(overlap.mean_jaccard) }}).
{%- else -%}
The union of unequal masks is that of independent ones, an upper bound.
{%- endif %}
{% if facts.k -%}
In round 1 that union is still empty, so a mask per client downloads nothing of it yet: a short run
flatters it.
{% endif -%}

{% if growth -%}
How the union of the clients' own masks grows as clients are added (mean over random orders), and what it makes a
client receive in a round:

|{% for column in growth[0] %} {{ column }} |{% endfor %}
|{% for column in growth[0] %}---:|{% endfor %}
{% for row in growth[1] -%}
|{% for cell in row %} {{ cell }} |{% endfor %}
{% endfor %}
![size of the union by number of clients](figures/{{ figures.growth }})

![how much two clients' masks share](figures/{{ figures.jaccard }})

![where the entries lie, by layer](figures/{{ figures.layers }})

{% endif -%}
What the other ways' bytes do not show:

{% for row in comparisons if row.not_charged -%}
- {{ row.label }}: {{ row.not_charged }}
{% endfor %}
{% if evaluation.messages -%}
Evaluating the final model on the clients' held-out rows moved {{ size(evaluation.payload_bytes) }} of payload more.

{% endif -%}
{% if resumed -%}
The run was interrupted and went on after round {{ resumed | join(", ") }}. Rounds that broke off and joining
again moved {{ size(repeated) }} of payload more, which no table above counts.
{% for note in differs -%}
Note: {{ note }}.
{% endfor %}

{% endif -%}
{% for remark in remarks -%}
Note: {{ remark }}.

{% endfor -%}
{% if beside -%}
{% set other, title, columns, rows = beside -%}
## Another run on the same shards

{{ title }} (`{{ other.folder.as_posix() }}`):

|{% for column in columns %} {{ column }} |{% endfor %}
|---|{% for column in columns[1:] %}---:|{% endfor %}
{% for row in rows -%}
|{% for cell in row %} {{ cell }} |{% endfor %}
{% endfor %}
*Values* are those that a client sends, without its head. Masks count in *all clients*, and what is new of their
union in *down*: with a mask a client there is none in round 1, so few rounds flatter it. One seed.

{% endif -%}
## Who holds what

![training rows by client and label](figures/{{ figures.labels }})

| client | task | training rows | held-out rows |
|---:|---|---:|---:|
{% for part in facts.partitions -%}
| {{ part.client }} | {{ part.task }} | {{ part.train_rows }} | {{ part.held_out_rows }} |
{% endfor %}
## Replies that did not count

{% if lost -%}
| round | client | reason |
|---:|---:|---|
{% for row in lost -%}
| {{ row.round }} | {{ row.client }} | {{ row.reason }} |
{% endfor %}
{% endif -%}
{% if kept.selected < kept.replied -%}
The strategy `{{ config.server.strategy }}` used {{ kept.selected }} of {{ kept.replied }} usable replies: it left out
{{ kept.replied - kept.selected }} (`selected` in rounds.jsonl has those that it used, round by round).

{% endif -%}
{% for round, note in notes -%}
- Round {{ round }}: {{ note }}.
{% endfor -%}
{% if not lost and kept.selected == kept.replied and not notes -%}
None: every reply of every round was used.
{% endif %}
## What these figures are, and are not

- *Payload* is values and indices alone. *Whole message* is the serialized Flower message: payload,
  envelope, metrics and Flower's own records.
- Not counted: HTTP and TCP headers, TLS, heartbeats, the bundle with the app's code, and the
  pre-trained checkpoint, which every party is taken to hold already.
- Scores are those of one seed. On n rows an accuracy near p has a standard error of
  sqrt(p (1 - p) / n); the dev scores here stand on at most {{ config.eval_rows }} rows,
  shared equally by the tasks.
- *Held-out rows, after local training* is each client's own model on its own rows (personalized);
  *as received* is the shared model on the same rows. Both are means over the
  round's usable replies, weighted by held-out rows.

## To run it again

    fedmask run --config {{ folder }}/config.json --engine {{ record.engine }} --name again

The same settings, versions and number of threads give the same final vector, bit for bit. `config.json`
holds every setting, the versions and the machine.

| | |
|---|---|
{% for name, value in identity -%}
| {{ name }} | `{{ value }}` |
{% endfor %}"""
