//! Tokens: who the user is, where a RequestAuthentication says how that is told.

use std::{sync::Arc, time::SystemTime};

use http::{header::WWW_AUTHENTICATE, request::Parts};

use super::super::{exchange::Exchange, reply::Reply};
use crate::authentication::Verdict;

/// Verifies the request's tokens.
///
/// # Errors
/// The answer to a token that is not accepted.
pub(crate) fn apply(exchange: &mut Exchange, parts: &mut Parts) -> Result<(), Box<Reply>> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let service = exchange.connection.service.as_ref();
    let policies = snapshot.l7.authentications_for(service);
    let authentication = &exchange.connection.waypoint.authentication;
    let head = exchange.head.as_ref();
    let authority = head.map_or("", |head| head.authority.as_str());
    match authentication.check(policies, parts, authority, SystemTime::now()) {
        Verdict::Anonymous => {}
        Verdict::Verified(claims) => exchange.claims = Some(Arc::from(claims)),
        Verdict::Refused(refusal) => {
            let reply = Reply::new(refusal.status, refusal.details());
            let reply = reply.body(refusal.reason.to_string());
            return Err(Box::new(reply.header(WWW_AUTHENTICATE, refusal.challenge)));
        }
    }
    forget_query(exchange, parts);
    Ok(())
}

/// A token that was taken out of the query is neither logged nor told to the backend in another header.
fn forget_query(exchange: &mut Exchange, parts: &Parts) {
    let Some(head) = &mut exchange.head else {
        return;
    };
    let (path, query) = match head.original.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (&*head.original, None),
    };
    if query == parts.uri.query() {
        return;
    }
    head.original = match parts.uri.query() {
        Some(query) => format!("{path}?{query}").into(),
        None => path.into(),
    };
}
