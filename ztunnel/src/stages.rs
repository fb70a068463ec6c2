//! A connection's task in two stages, so that an idle connection pays for the second alone.

use std::future::{Future, ready};

use futures_util::{FutureExt, future::Either};

/// Runs `begin`, and then `carry` with what it answers, if it does.
///
/// `begin` is boxed, as what leads to a connection needs far more room than carrying it does, and its box is gone before
/// `carry` starts. Both would have room of their own in an `async fn`, for as long as the connection lives.
pub(crate) fn begin_and_carry<T, C>(
    begin: impl Future<Output = Option<T>> + Send,
    carry: impl FnOnce(T) -> C + Send,
) -> impl Future<Output = ()> + Send
where
    T: Send,
    C: Future<Output = ()> + Send,
{
    Box::pin(begin).then(|begun| match begun {
        Some(begun) => Either::Left(carry(begun)),
        None => Either::Right(ready(())),
    })
}
