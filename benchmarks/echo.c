/*
 * The services of servers.py in C, on level-triggered epoll, to show what the
 * machine can do at most.
 *
 *     echo SERVICE
 *
 * SERVICE is echo, sink, source or udp; see servers.py.  The port is printed on
 * standard output.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BLOCK = 1 << 20, EVENTS = 256, BACKLOG = 1024, READ = 1 << 16 };

struct connection {
    int fd;
    size_t received;            /* part of a block, by a sink */
    char *rest;                 /* data that the kernel has not accepted yet */
    size_t sent, size;
};

static enum { ECHO, SINK, SOURCE, DATAGRAMS } service;
static char buffer[READ], block[BLOCK];
static int poller;

static void need(int good, const char *what) {
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void watch(int operation, int fd, uint32_t events, void *data) {
    struct epoll_event event = { .events = events, .data.ptr = data };
    need(epoll_ctl(poller, operation, fd, &event) == 0, "epoll_ctl");
}

static void drop(struct connection *c) {
    close(c->fd);
    free(c->rest);
    free(c);
}

static void answer(struct connection *c, const char *data, size_t size) {
    ssize_t n = send(c->fd, data, size, MSG_NOSIGNAL);
    if (n == (ssize_t)size)
        return;
    if (n < 0 && errno != EAGAIN)
        return drop(c);
    c->sent = 0;
    c->size = size - (n < 0 ? 0 : n);
    need((c->rest = malloc(c->size)) != NULL, "malloc");
    memcpy(c->rest, data + size - c->size, c->size);
    watch(EPOLL_CTL_MOD, c->fd, EPOLLOUT, c);
}

static void answer_rest(struct connection *c) {
    ssize_t n = send(c->fd, c->rest + c->sent, c->size - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN)
        return drop(c);
    c->sent += n < 0 ? 0 : n;
    if (c->sent == c->size) {
        free(c->rest);
        c->rest = NULL;
        watch(EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
    }
}

static void receive(struct connection *c) {
    ssize_t n = recv(c->fd, buffer, READ, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0)
        return drop(c);
    if (service == ECHO)
        return answer(c, buffer, n);
    if (service == SOURCE)
        return answer(c, block, BLOCK);
    c->received += n;
    if (c->received >= BLOCK) {
        c->received -= BLOCK;
        answer(c, ".", 1);
    }
}

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        need(c != NULL, "calloc");
        c->fd = fd;
        watch(EPOLL_CTL_ADD, fd, EPOLLIN, c);
    }
}

static void answer_datagrams(int fd) {
    struct sockaddr_in from;
    socklen_t size = sizeof from;
    ssize_t n;
    while ((n = recvfrom(fd, buffer, READ, 0, (void *)&from, &size)) >= 0)
        sendto(fd, buffer, n, 0, (void *)&from, size);
}

int main(int argc, char **argv) {
    static const char *services[] = { "echo", "sink", "source", "udp" };
    struct sockaddr_in at = { .sin_family = AF_INET };
    struct epoll_event events[EVENTS];
    socklen_t size = sizeof at;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (argc == 2 && service <= DATAGRAMS && strcmp(argv[1], services[service]))
        service++;
    if (argc != 2 || service > DATAGRAMS) {
        fputs("usage: echo echo|sink|source|udp\n", stderr);
        return 2;
    }
    int type = service == DATAGRAMS ? SOCK_DGRAM : SOCK_STREAM;
    int listener = socket(AF_INET, type | SOCK_NONBLOCK, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    need(bind(listener, (void *)&at, size) == 0, "bind");
    need(type == SOCK_DGRAM || listen(listener, BACKLOG) == 0, "listen");
    need(getsockname(listener, (void *)&at, &size) == 0, "getsockname");
    need((poller = epoll_create1(0)) >= 0, "epoll_create1");
    watch(EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);

    for (;;) {
        int n = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c == NULL && service == DATAGRAMS)
                answer_datagrams(listener);
            else if (c == NULL)
                accept_all(listener);
            else if (c->rest)
                answer_rest(c);
            else
                receive(c);
        }
    }
}
