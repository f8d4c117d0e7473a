"""The evaluation at the end of an epoch, and what it adds to the progress of the run."""

from typing import Any

from afkd_jax.checkpoints.progress import Best
from afkd_jax.method import state as state_lib
from afkd_jax.method.metrics import Evaluation
from afkd_jax.report.trackers import EvaluationValues
from afkd_jax.training.requests import Requests
from afkd_jax.training.session import Session


class EpochEvaluation:
    """Evaluates epochs on validation and test: every config.eval_every-th, and the last.

    On test only where a network is better on validation than ever before, and in the last epoch.
    Averages of the networks (config.ema) are evaluated on the same splits, as 'test_ema' and
    'validation_ema'; nothing is selected by them.
    Without a validation split every epoch is evaluated on test, for its curve; nothing is selected.

    Attributes:
      validation: of the last evaluated epoch; None without a validation split.
      test: of the last evaluated epoch; None if that was not evaluated on test in this process.
    """

    def __init__(self, session: Session, requests: Requests):
        self._session, self._requests = session, requests
        self.validation: Evaluation | None = None
        self.test: Evaluation | None = None

    def due(self, epoch: int) -> bool:
        """Returns whether this epoch, counted from 1, is evaluated."""
        config = self._session.run.config
        return epoch % config.eval_every == 0 or epoch == config.epochs

    def __call__(self, networks: Any, step: int, epoch: int) -> bool:
        """Evaluates; False if a signal ended it early: then it is repeated after a resume."""
        run, progress = self._session.run, self._session.snapshot.progress
        validation, test, improved = None, None, []
        if run.info.validation:
            validation = self._evaluate(networks, 'validation')
            if validation is None:
                return False
            improved = progress.improved(validation.accuracy)
        if validation is None or improved or epoch == run.config.epochs:
            test = self._evaluate(networks, 'test')
            if test is None:
                return False
        evaluations: dict[str, Evaluation] = {}
        for split, evaluation in (('test', test), ('validation', validation)):
            if not evaluation:
                continue
            evaluations[split] = evaluation
            if run.config.ema.decay:
                of_averages = self._evaluate(state_lib.averaged(networks), split)
                if of_averages is None:
                    return False
                evaluations[f'{split}_ema'] = of_averages
        for split, evaluation in evaluations.items():
            values = EvaluationValues(step, epoch, split, evaluation)
            self._session.tracker.handle(values)
            progress.evaluations[split] = step, evaluation
        for k in improved:
            assert validation
            assert test
            progress.best[k] = Best(step, validation.accuracy[k], test.accuracy[k])
        progress.evaluated, self.validation, self.test = step, validation, test
        return True

    def _evaluate(self, networks: Any, split: str) -> Evaluation | None:
        def stop() -> bool:
            self._requests.poll(may_save=False)
            return self._requests.stopped

        return self._session.evaluator(networks, split, stop)
