//! Pods' DNS: names of the mesh are answered here, everything else goes to the node's name servers untouched.

mod message;
mod resolv_conf;
