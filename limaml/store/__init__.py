"""Versioned meta embeddings: published whole, served from one version, refreshed in place."""

from limaml.store.contract import Estimate as Estimate
from limaml.store.contract import Expired as Expired
from limaml.store.contract import Forgotten as Forgotten
from limaml.store.contract import Lookup as Lookup
from limaml.store.contract import Pointer as Pointer
from limaml.store.contract import Publication as Publication
from limaml.store.contract import Published as Published
from limaml.store.contract import Reader as Reader
from limaml.store.contract import Size as Size
from limaml.store.contract import Store as Store
from limaml.store.contract import Upserted as Upserted
from limaml.store.contract import Version as Version
from limaml.store.lmdb import LmdbStore as LmdbStore
from limaml.store.redis import RedisStore as RedisStore
from limaml.store.url import open_store as open_store
