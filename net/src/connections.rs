//! Connections that are open now: for dumps, and to be cut when a policy comes to forbid them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Open connections, each described by a `T`, cut for a reason `C`. Holds as many entries as there are connections, so the limit of open
/// files bounds it.
#[derive(Debug)]
pub struct Registry<T, C> {
    entries: Mutex<HashMap<u64, Entry<T, C>>>,
    next: AtomicU64,
    removed: CancellationToken,
}

#[derive(Debug)]
struct Entry<T, C> {
    what: Arc<T>,
    cut: Option<oneshot::Sender<C>>,
}

/// One open connection. Dropping it takes it off the registry.
#[derive(Debug)]
pub struct Registration<T, C> {
    registry: Arc<Registry<T, C>>,
    id: u64,
    what: Arc<T>,
    cut: oneshot::Receiver<C>,
}

impl<T, C> Default for Registry<T, C> {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            next: AtomicU64::new(0),
            removed: CancellationToken::new(),
        }
    }
}

impl<T, C> Registry<T, C> {
    /// Enters a connection. An inbound one must be entered before its first authorization, or a policy that changes in
    /// between would miss it.
    pub fn register(self: &Arc<Self>, what: T) -> Registration<T, C> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let what = Arc::new(what);
        let (sender, cut) = oneshot::channel();
        let entry = Entry {
            what: what.clone(),
            cut: Some(sender),
        };
        self.entries.lock().insert(id, entry);
        Registration {
            registry: self.clone(),
            id,
            what,
            cut,
        }
    }

    /// What is open now, in no order that means anything.
    pub fn open(&self) -> Vec<(u64, Arc<T>)> {
        let entries = self.entries.lock();
        entries
            .iter()
            .map(|(id, e)| (*id, e.what.clone()))
            .collect()
    }

    /// The pod is gone: what is still open ends because of that.
    pub fn set_removed(&self) {
        self.removed.cancel();
    }

    /// Tells a connection to end, and why. Nothing happens where it has ended.
    pub fn cut(&self, id: u64, why: C) {
        let sender = self.entries.lock().get_mut(&id).and_then(|e| e.cut.take());
        if let Some(sender) = sender {
            // The receiver is gone where the connection is ending by itself.
            let _ = sender.send(why);
        }
    }
}

impl<T, C> Registration<T, C> {
    /// The connection's description.
    pub fn what(&self) -> &Arc<T> {
        &self.what
    }

    /// Whether the connection's pod is gone.
    pub fn is_removed(&self) -> bool {
        self.registry.removed.is_cancelled()
    }

    /// Resolves when the connection's pod is gone. Cancel-safe.
    pub fn removed(&self) -> impl Future<Output = ()> + use<T, C> {
        self.registry.removed.clone().cancelled_owned()
    }

    /// Resolves when the connection must end. Cancel-safe; must not be awaited again once it has resolved.
    pub async fn cut(&mut self) -> C {
        match (&mut self.cut).await {
            Ok(why) => why,
            Err(_) => std::future::pending().await,
        }
    }
}

impl<T, C> Drop for Registration<T, C> {
    fn drop(&mut self) {
        self.registry.entries.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_connection_that_is_cut_ends() {
        let registry = Arc::new(Registry::default());
        let mut a = registry.register("a");
        let mut b = registry.register("b");
        let found = registry.open().into_iter().find(|(_, what)| **what == "a");
        let (id, _) = found.expect("a is open");
        registry.cut(id, "denied");
        assert_eq!(a.cut().await, "denied");
        let still_open = tokio::select! {
            biased;
            _ = b.cut() => false,
            () = std::future::ready(()) => true,
        };
        assert!(still_open);
        drop((a, b));
        assert!(registry.open().is_empty());
    }
}
