/*
 * Makes the load for servers: a closed loop, in which each connection has one
 * request outstanding, and sends the next one when that is answered.
 *
 *     load KIND PORT ACTIVE REQUEST ANSWER IDLE
 *
 * KIND is tcp, udp or connect.  With connect, each request has a connection of
 * its own, which waits for the server to close its end as well, and ACTIVE
 * connections are in use at a time.  REQUEST and ANSWER are sizes in bytes;
 * REQUEST may instead be the path of a file with the request.  IDLE further
 * connections are opened first, and make one request each.
 *
 * It prints "ready" when everything is connected.  Then, for each number of
 * seconds read from standard input, it makes requests for that long, waits for
 * the outstanding answers, and prints its results as a line of JSON, with
 * latencies in microseconds.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE = 20, BATCH = 128, EVENTS = 256, ROOM = 1 << 20 };

struct connection {
    int fd;
    size_t to_send, to_receive;
    uint64_t since;
};

static enum { TCP, UDP, CONNECT } kind;
static struct sockaddr_in server = { .sin_family = AF_INET };
static size_t request_size, answer_size;
static char *payload, *answers;
static int poller;

/* One turn. */
static uint64_t deadline, last;
static size_t outstanding, done, space;
static uint32_t *latencies;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    exit(1);
}

static void need(bool good, const char *what) {
    if (!good)
        fail("%s: %s", what, strerror(errno));
}

static uint64_t now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ull + at.tv_nsec;
}

static int make_socket(void) {
    int fd = socket(AF_INET, kind == UDP ? SOCK_DGRAM : SOCK_STREAM, 0), on = 1;
    struct timeval patience = { .tv_sec = PATIENCE };
    need(fd >= 0, "socket");
    if (kind != UDP)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return fd;
}

static void watch(struct connection *c) {
    struct epoll_event event = {
        .events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c
    };
    need(epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) == 0, "epoll_ctl");
}

/* Connect, and make one request on each connection, all at the same time. */
static void open_all(struct connection *c, size_t count) {
    for (size_t i = 0; i < count; i++) {
        c[i].fd = make_socket();
        need(connect(c[i].fd, (void *)&server, sizeof server) == 0, "connect");
        for (size_t sent = 0; sent < request_size;) {
            ssize_t n = send(c[i].fd, payload, request_size - sent, MSG_NOSIGNAL);
            need(n > 0, "send");
            sent += n;
        }
    }
    for (size_t i = 0; i < count; i++)
        for (size_t got = 0; got < answer_size;) {
            ssize_t n = recv(c[i].fd, answers, ROOM, 0);
            if (n == 0)
                fail("the server has closed a connection");
            need(n > 0, "recv");
            got += n;
        }
}

static void open_batches(struct connection *c, size_t count) {
    for (size_t i = 0; i < count; i += BATCH)
        open_all(c + i, count - i < BATCH ? count - i : BATCH);
}

/* Open a connection for the next request, each from another address, so that
 * ports in TIME_WAIT do not use up all ports. */
static void reconnect(struct connection *c) {
    static uint32_t turn;
    struct sockaddr_in from = { .sin_family = AF_INET };
    int on = 1;
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + turn++ % 250);
    c->fd = make_socket();
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    need(bind(c->fd, (void *)&from, sizeof from) == 0, "bind");
    need(connect(c->fd, (void *)&server, sizeof server) == 0, "connect");
    watch(c);
}

static void send_more(struct connection *c) {
    while (c->to_send) {
        ssize_t n = send(c->fd, payload, c->to_send, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        need(n > 0, "send");
        c->to_send -= n;
    }
}

static void ask(struct connection *c) {
    c->since = now();
    if (kind == CONNECT)
        reconnect(c);
    c->to_send = request_size;
    c->to_receive = answer_size;
    send_more(c);
}

static void answered(struct connection *c) {
    last = now();
    if (done == space) {
        space = space ? 2 * space : 1 << 16;
        latencies = realloc(latencies, space * sizeof *latencies);
        need(latencies, "realloc");
    }
    uint64_t latency = last - c->since;
    latencies[done++] = latency > UINT32_MAX ? UINT32_MAX : latency;
    if (last < deadline)
        ask(c);
    else
        outstanding--;
}

static void receive(struct connection *c) {
    for (;;) {
        ssize_t n = recv(c->fd, answers, ROOM, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        need(n >= 0, "recv");
        if (n == 0 && kind == CONNECT && c->to_receive == 0) {
            close(c->fd);
            return answered(c);
        }
        if (n == 0)
            fail("the server has closed a connection");
        if ((size_t)n > c->to_receive)
            fail("the server has sent more than it was asked for");
        c->to_receive -= n;
        if (c->to_receive == 0 && kind != CONNECT)
            return answered(c);
        if (c->to_receive == 0)
            shutdown(c->fd, SHUT_WR);
        else if (n < ROOM)
            return;
    }
}

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void turn(struct connection *active, size_t count, double seconds) {
    struct epoll_event events[EVENTS];
    uint64_t start = now();
    deadline = start + (uint64_t)(seconds * 1e9);
    done = 0;
    outstanding = count;
    for (size_t i = 0; i < count; i++)
        ask(&active[i]);
    while (outstanding) {
        int n = epoll_wait(poller, events, EVENTS, PATIENCE * 1000);
        need(n >= 0, "epoll_wait");
        if (n == 0)
            fail("the server has not answered for %d seconds", PATIENCE);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->to_send)
                send_more(c);
            if (events[i].events & ~EPOLLOUT)
                receive(c);
        }
    }
    qsort(latencies, done, sizeof *latencies, compare);
    printf("{\"requests\": %zu, \"elapsed\": %.9f, \"p50\": %.3f, \"p99\": %.3f}\n",
           done, (last - start) / 1e9, latencies[done / 2] / 1e3,
           latencies[done * 99 / 100] / 1e3);
}

static void read_request(const char *path) {
    FILE *file = fopen(path, "rb");
    need(file != NULL, path);
    payload = malloc(ROOM);
    need(payload != NULL, "malloc");
    request_size = fread(payload, 1, ROOM, file);
    need(request_size > 0, path);
    fclose(file);
}

int main(int argc, char **argv) {
    static const char *kinds[] = { "tcp", "udp", "connect" };
    double seconds;
    if (argc != 7)
        fail("usage: load KIND PORT ACTIVE REQUEST ANSWER IDLE");
    while (strcmp(argv[1], kinds[kind]) != 0)
        if (++kind > CONNECT)
            fail("not a kind of load: %s", argv[1]);
    server.sin_port = htons(atoi(argv[2]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    size_t count = atol(argv[3]), idle = atol(argv[6]);
    request_size = atol(argv[4]);
    answer_size = atol(argv[5]);
    if (request_size == 0) {
        read_request(argv[4]);
    } else {
        payload = malloc(request_size);
        need(payload != NULL, "malloc");
        memset(payload, 'x', request_size);
        payload[request_size - 1] = '\n';
    }
    answers = malloc(ROOM);
    struct connection *all = calloc(count + idle, sizeof *all);
    need(answers && all, "malloc");
    need((poller = epoll_create1(0)) >= 0, "epoll_create1");

    if (kind != CONNECT) {
        open_batches(all, idle);
        open_batches(all + idle, count);
        for (size_t i = 0; i < count; i++)
            watch(&all[idle + i]);
    }
    setlinebuf(stdout);
    puts("ready");
    while (scanf("%lf", &seconds) == 1)
        turn(all + idle, count, seconds);
    return 0;
}
