"""The public names for type checkers; `rap_env` imports them on first use."""

from rap_env.envs.ladder import RAPLadderEnv as RAPLadderEnv
from rap_env.envs.ladder import RAPLadderVectorEnv as RAPLadderVectorEnv
from rap_env.envs.prune import RAPPruneEnv as RAPPruneEnv
from rap_env.envs.prune import RAPPruneVectorEnv as RAPPruneVectorEnv
from rap_env.envs.vector import make_vec as make_vec
from rap_env.errors import RapError as RapError
from rap_env.importance.gsi_search import gsi as gsi
from rap_env.leaderboard.evaluation import evaluate as evaluate
from rap_env.memory import MemoryModel as MemoryModel
from rap_env.models.files.loading import load_llm as load_llm
from rap_env.models.files.pruned_checkpoint import load_pruned as load_pruned
from rap_env.models.files.pruned_checkpoint import save_pruned as save_pruned
from rap_env.plan import Plan as Plan
from rap_env.policies.loading import load_policy as load_policy
from rap_env.request import Request as Request
from rap_env.runtime.controller import RuntimeController as RuntimeController
from rap_env.scoring.corpus import CorpusConfig as CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus as load_corpus
from rap_env.scoring.plan_lm import PlanLM as PlanLM
from rap_env.scoring.scorer import PlanScorer as PlanScorer

__version__: str
