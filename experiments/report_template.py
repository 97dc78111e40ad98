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

| direction | payload | whole message |
|---|---:|---:|
{% for row in traffic -%}
| {{ row.direction }} | {{ size(row.payload) }} | {{ size(row.message) }} |
{% endfor %}
Against other ways of fine-tuning with the same clients, rounds and heads (payload; means per client and
round, then the whole run with all clients and both directions):

| what is sent | up | down | whole run | times this run |
|---|---:|---:|---:|---:|
{% for row in comparisons -%}
| {{ row.label }} | {{ size(row.up) }} | {{ size(row.down) }} | {{ size(row.total) }} | {{ "%.2f" | format(row.ratio) }} |
{% endfor %}
The first row is the sum of this run's ledger (masks and training); the others are computed from shapes and
this run's schedule: the same k and the same value size, indices at the best code known and charged
whenever a mask is new to its reader. {% if overlap -%}
A mask per client: its k entries of largest mean gradient over
{{ overlap.batches }} of its own batches. The masks of the {{ overlap.clients }} clients hold
{{ "{:,}".format(overlap.union) }} different entries ({{ "%.2f" | format(overlap.union / overlap.k) }} x k;
mean Jaccard index {{ score(overlap.mean_jaccard) }}).
{%- else -%}
The union of unequal masks is that of independent ones, an upper bound.
{%- endif %}

What the other ways' bytes do not show:

{% for row in comparisons if row.not_charged -%}
- {{ row.label }}: {{ row.not_charged }}
{% endfor %}
{% if evaluation.messages -%}
Evaluating the final model on the clients' held-out rows moved {{ size(evaluation.payload_bytes) }} of payload more.

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
{%- else -%}
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
  *as received* is the shared model on the same rows. Both are means over the sampled clients.

## To run it again

    fedmask run --config {{ folder }}/config.json --engine {{ record.engine }} --name again

The same settings, versions and number of threads give the same final vector, bit for bit. `config.json`
holds every setting, the versions and the machine.

| | |
|---|---|
{% for name, value in identity -%}
| {{ name }} | `{{ value }}` |
{% endfor %}"""
