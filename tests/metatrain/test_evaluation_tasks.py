"""Do the networks of suite 2 compute what they are named after?"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")  # for the digits

from pylo_integrations.evaluation import SUITES
from pylo_integrations.evaluation.tasks import graphs, sequences
from pylo_integrations.evaluation.tasks.base import first_images
from pylo_integrations.metatrain import DataError, data


def model_and_examples(name, count=6):
    task = SUITES[2][name]
    try:
        examples = task.data()[0]
    except DataError as error:
        pytest.skip(str(error))
    return task.model(0), examples.rows(torch.arange(count))


def test_the_poisson_network_s_output_is_its_laplacian():
    model, (points, _) = model_and_examples("poisson_network")
    model, points = model.double(), points.double().requires_grad_()
    hidden = 2 * points - 1
    for layer in model.layers:
        hidden = layer(hidden).tanh()
    border = (points * (1 - points)).prod(1)
    values = border * (model.last(hidden) * model.scale).squeeze(1)
    [slopes] = torch.autograd.grad(values.sum(), points, create_graph=True)
    bends = [torch.autograd.grad(slopes[:, axis].sum(), points, retain_graph=True)[0][:, axis] for axis in (0, 1)]
    torch.testing.assert_close(model(points).squeeze(1), -sum(bends))


def test_the_flow_knows_how_it_changes_volumes():
    model, (points, _) = model_and_examples("spirals_flow")
    model = model.double()
    for point in points.double():
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x.unsqueeze(0))[0].squeeze(0), point)
        torch.testing.assert_close(model(point.unsqueeze(0))[1].squeeze(), jacobian.det().abs().log())


def test_the_autoregressive_network_sees_only_what_came_before():
    model, (images, _) = model_and_examples("digits_autoregressive", 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x.unsqueeze(0)).squeeze(0), images[0])
    assert not jacobian.triu().any() and jacobian.tril(-1).any(1)[2:].all()


@pytest.mark.parametrize("name", ["text_state_space", "text_adapters"])
def test_language_models_do_not_see_what_comes_next(name):
    model = SUITES[2][name].network(SUITES[2][name].width, 1.0)
    before = torch.randint(48, (2, 24))
    after = before.clone()
    after[:, -1] += 1
    torch.testing.assert_close(model(before)[:, :-1], model(after % 48)[:, :-1])


def test_a_state_space_is_its_recurrence():
    torch.manual_seed(0)
    model = sequences._StateSpace(8, 1.0).double()
    characters = torch.randint(48, (2, 7))
    hidden = model.embedding(characters)
    for layer in range(2):
        signal, decay = model.norms[layer](hidden), torch.exp(-model.log_rates[layer].exp())
        state, seen = torch.zeros(2, 8, model.states, dtype=torch.float64), []
        for step in range(characters.shape[1]):
            state = decay * state + signal[:, step].unsqueeze(-1)
            seen.append((state * model.responses[layer]).sum(-1) + model.direct[layer] * signal[:, step])
        mixed = model.mixing[layer](torch.nn.functional.gelu(torch.stack(seen, 1)))
        hidden = hidden + torch.nn.functional.glu(mixed)
    torch.testing.assert_close(model(characters), model.readout(hidden))


def test_answers_of_computed_tasks_are_right():
    examples = sequences._addition()[1].rows(torch.arange(50))
    for row, digits in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        first, second, total = (int("".join(map(str, part))) for part in (row[:3], row[3:6], digits))
        assert first + second == total and row[6:] == digits[:-1]
    numbers, ordered = sequences._sorting()[1].rows(torch.arange(50))
    assert [sorted(row[:10]) for row in numbers.tolist()] == ordered.tolist()


def test_distances_in_graphs_are_breadth_first():
    examples = graphs._distances()[1].rows(torch.arange(20))
    for graph, distances in zip(examples.inputs, examples.targets.tolist(), strict=True):
        edges, start = graph[:, :16], int(graph[:, 16].argmax())
        found, frontier = {start: 0}, [start]
        for node in frontier:
            for other in edges[node].nonzero().flatten().tolist():
                if other not in found:
                    found[other] = found[node] + 1
                    frontier.append(other)
        assert distances == [min(found.get(node, 9), 5) for node in range(16)]


def test_validation_images_stay_validation_images():
    inputs, _ = first_images("digits", 100)
    validation = {image.numpy().tobytes() for image in data.images("digits")[1].inputs}
    assert [image.numpy().tobytes() in validation for image in inputs] == [row % 5 == 0 for row in range(len(inputs))]


@pytest.mark.parametrize("name", ["text_adapters"])
def test_adapters_begin_at_the_frozen_network_and_alone_are_trained(name):
    model = SUITES[2][name].network(64, 1.0)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"down", "up"}
    characters = torch.randint(48, (2, 24))
    before = model(characters)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(".down"):
                p.normal_()
    torch.testing.assert_close(model(characters), before)
