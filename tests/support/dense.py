"""Every method's loss in its obvious form: full logits of all tokens at once, gradients by autograd.

`dense_loss` is what tests compare the streamed losses with, and what the benchmark measures them against.
"""

import torch
from torch.nn.functional import cross_entropy

from dskd.losses.uld import Uld


def distance(settings, logits, teacher_logits):
    """[N], from the definitions, on probabilities."""
    p = (logits / settings.temperature).softmax(-1)
    q = (teacher_logits / settings.temperature / settings.teacher_temperature).softmax(-1)

    def kl(a, b):
        return torch.xlogy(a, a).sub(torch.xlogy(a, b)).sum(-1)

    match settings.divergence:
        case "forward_kl":
            return kl(q, p)
        case "reverse_kl":
            return kl(p, q)
        case "js_divergence":
            return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
        case "skewed_forward_kl":
            return kl(q, settings.skew * q + (1 - settings.skew) * p)
        case "skewed_reverse_kl":
            return kl(p, settings.skew * p + (1 - settings.skew) * q)
        case "adaptive_kl":
            gap = (p - q).detach().abs()
            ordered, order = q.sort(dim=-1, stable=True)  # of equal ones the first are the tail
            tail = (gap.gather(-1, order) * (ordered.cumsum(-1) < settings.adaptive_alpha)).sum(-1)
            share = tail / gap.sum(-1).clamp_min(1e-30)  # p = q: both distances are 0, whatever the share
            return (1 - share) * kl(q, p) + share * kl(p, q)


def dense_loss(method, student, teacher, own, other):
    """Parts {name: (sum, tokens)} of one micro-batch of `own` and `other`, the sides' `Tokens`."""
    settings, kind = method.settings, method.settings.kind
    logits, teacher_logits = student.logits(own.hidden), teacher.logits(other.hidden).detach()
    count = len(own.labels)
    parts = {
        "ce": (cross_entropy(logits, own.labels, reduction="sum", label_smoothing=settings.label_smoothing), count)
    }
    match kind:
        case "kd":
            width = min(student.vocab_size, teacher.vocab_size)
            parts["kd"] = distance(settings, logits[:, :width], teacher_logits[:, :width]).sum(), count
        case "uld":
            pairs = Uld.aligned(method, own, other)
            p, q = logits.softmax(-1)[pairs[:, 1]], teacher_logits.softmax(-1)[pairs[:, 0]]
            wide = max(p.shape[-1], q.shape[-1])
            p, q = (torch.nn.functional.pad(x, (0, wide - x.shape[-1])).sort(-1).values for x in (p, q))
            parts["kd"] = (p - q).abs().sum(), count
        case "mined":
            parts["kd"] = mined(method, logits, teacher_logits, own, other), count
        case "dskd" | "dskd_cma":
            if kind == "dskd":
                t2s_hidden, s2t_hidden = method.t2s(other.hidden), method.s2t(own.hidden)
            else:
                t2s_hidden, s2t_hidden = method.cross_attention(own, other)
            t2s_logits = frozen(student).logits(t2s_hidden)
            s2t_logits = frozen(teacher).logits(s2t_hidden)
            right = t2s_logits.argmax(-1) == own.labels if kind == "dskd_cma" else 1.0
            parts["t2s_ce"] = cross_entropy(t2s_logits, own.labels, reduction="sum"), count
            parts["t2s_kd"] = (distance(settings, logits, t2s_logits.detach()) * right).sum(), count
            p = (s2t_logits / settings.temperature).log_softmax(-1)
            q = (teacher_logits / settings.temperature).log_softmax(-1)
            parts["s2t_kd"] = torch.nn.functional.kl_div(p, q, reduction="sum", log_target=True), count
        case "dskd_v2" | "dskd_v2_eta":
            parts |= successor(method, student, teacher, logits, teacher_logits, own, other)
    return parts


def mined(method, logits, teacher_logits, own, other):
    settings = method.settings
    temperature = settings.temperature * settings.teacher_temperature
    q = (teacher_logits / temperature).softmax(-1)
    target_of_source = method.targets.repeat_interleave(method.runs)
    q = torch.zeros(len(q), logits.shape[-1]).index_add(1, target_of_source, q[:, method.sources])
    total = torch.zeros(())
    partner = {s: t for t, s in other.pairs.tolist()}
    for token in range(len(own.labels)):
        if token in partner:
            teacher = q[partner[token]][method.targets].log() * temperature
            total = total + distance(settings, logits[token, method.targets][None], teacher[None]).sum()
        else:
            total = total + cross_entropy(logits[token] / settings.temperature, own.labels[token])
    return total


def successor(method, student, teacher, logits, teacher_logits, own, other):
    settings = method.settings
    pairs = torch.arange(len(own.labels)).repeat(2, 1).T if other.pairs is None else other.pairs
    predictions = teacher_logits[pairs[:, 0]].argmax(-1)
    targets = method.student_ids[predictions]
    pairs, targets = pairs[targets >= 0], targets[targets >= 0]
    t2s_logits = frozen(student).logits(method.t2s(other.hidden[pairs[:, 0]]))
    s2t_logits = frozen(teacher).logits(method.to_teacher(own.hidden[pairs[:, 1]]))
    right = t2s_logits.argmax(-1) == targets
    if not settings.agreement_mask:
        right = torch.ones_like(right)
    t2s_kd = distance(settings, logits[pairs[:, 1]], t2s_logits.detach())
    s2t_kd = distance(settings, s2t_logits, teacher_logits[pairs[:, 0]])
    return {
        "t2s_ce": (cross_entropy(t2s_logits, targets, reduction="sum"), len(targets)),
        "t2s_kd": ((t2s_kd * right).sum(), int(right.sum())),
        "s2t_kd": (s2t_kd.sum(), len(targets)),
    }


def frozen(model):
    """The same model, whose head takes no gradient."""
    bias = None if model.bias is None else model.bias.detach()
    return type(model)(model.embeddings, model.weight.detach(), bias, model.shape)
