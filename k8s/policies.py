"""What network policies mean for the pods of a service: who is covered, and who may reach whom.

Only what the objects say: whether the cluster's network enforces them cannot be seen through the API server.
Peers are judged by their pods' labels within one namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Labels = dict[str, str]


def selects(selector: Any, labels: Labels) -> bool:
    """Whether a label selector takes an object with these labels; an empty one takes every object."""
    if any(labels.get(name) != value for name, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(rule, labels) for rule in selector.get("matchExpressions") or [])


def covered(policies: list[Any], labels: Labels) -> bool:
    """Whether any policy closes what it does not open to such a pod."""
    return any(_covering(policies, labels))


def admitted(policies: list[Any], target: Labels, peer: Labels) -> bool:
    """Whether a pod of the same namespace may reach every port of another."""
    covering = list(_covering(policies, target))
    rules = [rule for policy in covering for rule in policy["spec"].get("ingress") or []]
    return not covering or any(
        not rule.get("ports") and (not rule.get("from") or any(_is(item, peer) for item in rule["from"]))
        for rule in rules
    )


def _covering(policies: list[Any], labels: Labels) -> Iterator[Any]:
    for policy in policies:
        spec = policy["spec"]
        if "Ingress" in spec.get("policyTypes", ["Ingress"]) and selects(spec.get("podSelector", {}), labels):
            yield policy


def _is(peer: Any, labels: Labels) -> bool:
    """Whether a peer of a rule is such a pod of the policy's namespace; other namespaces are not known."""
    return (
        "podSelector" in peer and not peer.get("namespaceSelector") and selects(peer["podSelector"], labels)
    )


def _holds(rule: Any, labels: Labels) -> bool:
    name, values = rule["key"], rule.get("values") or []
    answers = {
        "In": labels.get(name) in values,
        "NotIn": labels.get(name) not in values,
        "Exists": name in labels,
        "DoesNotExist": name not in labels,
    }
    return answers[rule["operator"]]
