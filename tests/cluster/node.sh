#!/bin/sh
# node.sh FOLDER BIN: makes the root of a node from the machine's programs and the node's own folders, and becomes its first
# process. It runs in namespaces of its own; what it mounts ends with them.
set -eu
folder=$1 bin=$2 root=$1/root

hostname "${folder##*/}"
mount -t tmpfs -o mode=755 node "$root"
cd "$root"
mkdir -p usr etc dev proc sys run tmp var opt/cni opt/rig/bin node root before
for name in bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$name" ]; then
        cp -P "/$name" "$name"
    elif [ -d "/$name" ]; then
        mkdir "$name"
        mount --rbind "/$name" "$name"
    fi
done
mount --rbind /usr usr
mount --rbind /dev dev
mount --rbind /sys sys
mount -t overlay -o "lowerdir=/etc,upperdir=$folder/etc,workdir=$folder/etc-work" etc etc
mount -t proc proc proc
mount -t tmpfs -o mode=755 run run
mount --bind "$folder/var" var
mount --bind "$folder/tmp" tmp
mount --bind "$folder/cni" opt/cni
mount --bind "$bin" opt/rig/bin
# Last: what is bound before would be seen below it as well.
mount --bind "$folder" node
pivot_root . before
cd /
umount -l /before
# Pods' mounts reach the containers that ask for it, as on any node.
mount --make-rshared /

# A node's first process reaps orphans; with it the whole node ends.
exec sh -c 'touch /run/up; while :; do sleep 86400 & wait; done'
